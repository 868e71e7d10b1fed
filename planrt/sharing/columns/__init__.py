"""Different columns about the same people: what owners of tables and a third party do together. No I/O.

Tables and ids (`table`, `ids`), private set intersection (`curve`, `intersection`), Paillier's encryption (`paillier`)
with several values in a plaintext (`packing`), linear and logistic regression on it (`linear`) and on secret shares
(`shared`). Each party's part is a generator (`steps`); workers run it (`planrt.workers.machine.joint`).
`planrt.vertical` is what users touch.

**Security model.** Parties follow the protocols and try to learn more from what they see (semi-honest). No two of them
put together what they have seen: the key holder and an owner together read everything that was encrypted, the provider
and an owner everything that was shared. What each one learns is said in the docstrings of `intersection`, `linear` and
`shared`.
"""
