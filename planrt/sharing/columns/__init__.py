"""Different columns about the same people: what owners of tables and the holder of a key do together. No I/O.

Tables and ids (`table`, `ids`), private set intersection (`curve`, `intersection`), Paillier's encryption (`paillier`)
with several values in a plaintext (`packing`), linear and logistic regression on it (`linear`). Each party's part is a
generator (`steps`); workers run it (`planrt.workers.machine.joint`). `planrt.vertical` is what users touch.

**Security model.** Parties follow the protocols and try to learn more from what they see (semi-honest). No two of them
put together what they have seen: the key holder and an owner together read everything that was encrypted. What each
one learns is said in the docstrings of `intersection` and `linear`.
"""
