"""Classifiers of the library transformers, with random weights: recorded, trained in rounds, and sent."""

from __future__ import annotations

import asyncio
import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import TraceError
from planrt.fl import RoundScheduler, TrainConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0}


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=20, **SIZES,
        )
    )  # fmt: skip


def gpt2(**options):
    config = {"bos_token_id": 1, "eos_token_id": 1, **SIZES, **options}
    return transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=20, **config)
    )


class Classifier(nn.Module):
    """What a user wraps around such a model to give it a data set's tensors."""

    def __init__(self, make, *, mask):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.mask = make(), mask

    def forward(self, x):
        return self.net(input_ids=x, attention_mask=(x != 0).long() if self.mask else None).logits


@pytest.fixture
def sentences():
    x = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(1))
    x[1:, 5:] = 0
    return x


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_classifiers_equal_eager_in_both_modes(make, mask, sentences):
    model = Classifier(make, mask=mask)
    plan = planrt.Plan(model).build(sentences)
    for training in (True, False):
        plan.train(training)
        for x in (sentences, sentences.flip(0)[:3], sentences.clamp(min=1)):  # the last has no padding
            torch.manual_seed(1)
            want = model(x)
            torch.manual_seed(1)
            torch.testing.assert_close(plan(x), want)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_classifiers_train_in_rounds(make, sentences, make_worker):
    target = torch.tensor([0, 1, 2, 1])
    worker = make_worker("bob", {"d": planrt.BaseDataset(sentences, target)})
    model = Classifier(make, mask=True)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    config = TrainConfig(model, F.cross_entropy, batch_size=2, shuffle=False)

    async def one_round():
        scheduler = RoundScheduler([worker], config, dataset_key="d", seed=1)
        await scheduler.prepare()
        return (await scheduler.run_round(1, config.state)).state

    local = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for i in (0, 2):
        optimizer.zero_grad()
        F.cross_entropy(local(sentences[i : i + 2]), target[i : i + 2]).backward()
        optimizer.step()
    want = local.state_dict()
    for name, value in asyncio.run(one_round()).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)


def test_a_model_that_was_sent_computes_there(sentences, make_worker):
    bob = make_worker("bob")
    planrt.TorchHook(torch)
    model = Classifier(bert, mask=True).eval()
    want = model(sentences)
    model.send(bob)
    torch.testing.assert_close(model(sentences.send(bob)).get(), want)


def test_what_the_library_itself_refuses_is_told_in_its_words(sentences):
    model = Classifier(lambda: gpt2(pad_token_id=None), mask=True)
    with pytest.raises(TraceError, match="no padding token is defined"):
        planrt.Plan(model).build(sentences)
