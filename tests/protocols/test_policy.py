"""Protocols over workers whose owners have a say: plans that are approved run, others are named with their step."""

import pytest
import torch

from planrt import Protocol, Step
from planrt.errors import RemoteError
from planrt.plans.policy.rules import Policy
from planrt.workers import VirtualWorker


@pytest.mark.parametrize("sent", [False, True])
def test_only_approved_plans_run(inc, double, add, sent):
    policy = Policy(approval="list", approved=tuple(plan.graph.hash for plan in (inc, add)))
    with (
        VirtualWorker("clinic", policy=policy) as clinic,
        VirtualWorker("bob") as bob,
        VirtualWorker("james") as james,
    ):
        protocol = Protocol(
            [
                Step("clinic", inc, ["x"], name="start"),
                Step(
                    "bob", double, ["start"], name="left"
                ),  # copied to bob, by no op that would need approval
                Step("clinic", add, ["start", "left"], name="sum"),
            ],
            inputs=["x"],
        ).deploy(clinic, bob)
        refused = Protocol([Step("bob", inc, name="fine"), Step("clinic", double, name="not approved")])
        refused.deploy(clinic, bob)
        if sent:
            protocol.send(james)
            refused.send(james)
        result = protocol.run(torch.tensor([1.0]))
        assert (result.get().get() if sent else result.get()).tolist() == [6]
        with pytest.raises(RemoteError, match="step 'not approved'.*was not approved") as caught:
            refused.run(torch.tensor([1.0]))
        assert (caught.value.step, caught.value.kind) == ("not approved", "NotApprovedError")
