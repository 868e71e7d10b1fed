"""Arithmetic on secrets that several parties hold in parts. Pure functions: no network, no loop, no threads.

**Security model.** Two or more parties, semi-honest: each follows the protocol and tries to learn what it can from what
it sees. A dealer (0.2's crypto provider) hands out correlated randomness, sees no message between the parties, and
colludes with none of them. All parties but one may collude: their joint view is independent of the secrets, up to what
is opened on purpose. Nothing is hidden about shapes, scales, public values, or which operations run. A party that
deviates can spoil results and, by that, learn things: that is not protected.

**Where values live.** A secret is a tensor of int64, read modulo 2**64; each party holds one part, the parts add up to
it. Fractions are integers times a public scale (`fixed_point`). Bits inside comparisons are XOR parts, packed eight to
a byte across elements.

**How a protocol is written.** As a generator over one party's view (`Party`): it yields a list of tensors that all
parties open together (one round), receives what was opened, and returns this party's part of the result. Everything
between two openings is local. `rounds.run_together` drives all parties in one process; over a network, an `open` that
sends and receives takes its place. `rounds.together` runs independent protocols in shared rounds.

    randomness      the keyed stream every random number comes from
    ring            int64 modulo 2**64, packed bits
    rounds          protocols: openings, several at once, all parties in one process
    correlated      what the dealer hands out, used once; `requests` has what can be asked for
    fixed_point     fractions as integers with a public scale
    additive        sharing, reconstruction, what is local
    masked          a value opened under a mask: opened once, used in products, quotients and comparisons
    products        products of masked values (Beaver)
    quotients       division by a public number, which scaling down after a product is
    comparisons     signs and equality, as bits
    selection       relu, abs, clamp, where, largest and smallest of several
    curves          functions of one variable, as cubic pieces (`splines`)
    roots           reciprocals, quotients, roots, logarithms over the whole range
    networks        softmax, losses, means and norms
    kernels/        PyTorch's operations as protocols (`table`), on what a party holds of a value (`parts`)
    programs/       lists of kernel calls as data, which a party runs with shared rounds; what a run needs of the dealer
    tensors/        SharedTensor: PyTorch's autograd and modules on shares (`shared`); where these are and who computes
                    on them, as an interface (`sessions`), and with all parties in this process (`in_process`)

`secure_sum` is another protocol, with a security model of its own: sums over workers that may drop out.
"""
