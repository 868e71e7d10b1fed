"""The sum of what many workers hold, for a coordinator who learns nothing else. No sockets: messages in, messages out.

Source: Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal and Seth, "Practical Secure Aggregation
for Privacy-Preserving Machine Learning" (CCS 2017), section 4 and figure 4. Its signatures and
its consistency round are there for workers that have keys for them (`signing`).

**The idea.** Each worker adds masks to its values before they leave. Every two workers agree on a mask that one adds
and the other subtracts, so that these cancel in the sum. A worker that drops out leaves masks behind that do not; so
each splits the secret that its masks come from among all (Shamir), and `threshold` of them can restore it. A reply
that was only late would then lie open, which is why each adds a mask of its own as well: for each worker either the
one or the other secret is restored, never both.

**The four or five messages** of the coordinator to each worker, and what comes back (`member` has the worker's side,
`coordinator` the other; `group` is what all agree on)::

    join      two fresh public keys; of the workers that answer, the group is made
    share     the group goes out; this worker's two secrets come back as sealed shares, one for each other worker
    mask      the shares for it go out; its values come back, masked: what is seen of them is uniformly random
    sign      (where all signed their keys) who has answered goes out; a signature of that list comes back
    reveal    who has answered goes out, with these signatures; of each who has its share of the own mask's seed comes
              back, and of the others that of the key of their masks

At each step workers may be gone; with fewer than `threshold` left there is no sum, and nothing is revealed.

**Security model.** The coordinator and the workers are semi-honest: they follow the protocol, and try to learn what
they can. Fewer than `threshold` workers who collude with the coordinator learn, beyond their own values, the sum of
the others', which the result gives away, and nothing else. What a coordinator could gain that does not follow the
protocol:

* *It lies about who dropped out*, and asks some for the one and others for the other secret of a worker. Each answers
  once, so both need `threshold` different workers: more than half, as is demanded here, is enough against a
  coordinator alone. Where c workers help it, 2 * threshold > n + c is: hence two thirds and one more by default.
* *It asks again with other survivors, or in a later round.* Keys and seeds are of one aggregation, a member answers
  each message once, and a key is never used for two.
* *It tells workers of different groups, or gives them different models to train*, so that one's values show in the
  sum. Every key depends on the whole group and on what was asked of all (`context`): masks then do not cancel.
* *It hands out keys of its own in a worker's name.* Keys travel through the coordinator: only a signature says whose
  they are, and a worker whose owner has the others' public keys takes none without.
* *It tells workers different lists of survivors.* Above, a majority is what helps; with signatures each reveals what
  belongs to the list that `threshold` members have signed, and each signs one.
* *It runs workers itself.* Nothing here stops that: a sum over an owner's worker and others that are the coordinator's
  is the owner's value. An owner names the peers, and so chooses with whom.

Hidden are the values. Who takes part, who dropped out, and how many values there are is not. The sum itself can tell
much of one worker where the others' values are known or few: this is no differential privacy.
"""
