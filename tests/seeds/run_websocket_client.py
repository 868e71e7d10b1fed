"""The client module that users of document 2 and of document 3, section 14, had beside their notebook, in our words.

It is written for PySyft 0.2, with its imports and keywords; the tests import it after `planrt.compat`.
"""

import argparse
import asyncio
import logging

import numpy as np
import syft as sy
import torch
import torch.nn as nn
import torch.nn.functional as f
from syft.frameworks.torch.fl import utils

logger = logging.getLogger("run_websocket_client")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, 1)
        self.conv2 = nn.Conv2d(8, 16, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 16, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = f.relu(self.conv1(x))
        x = f.max_pool2d(x, 2, 2)
        x = f.relu(self.conv2(x))
        x = f.max_pool2d(x, 2, 2)
        x = x.view(-1, 4 * 4 * 16)
        x = f.relu(self.fc1(x))
        x = self.fc2(x)
        return f.log_softmax(x, dim=1)


@torch.jit.script
def loss_fn(pred, target):
    return f.nll_loss(input=pred, target=target)


def define_and_get_arguments(args=None):
    parser = argparse.ArgumentParser(description="Federated learning with websocket workers.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--test_batch_size", type=int, default=128)
    parser.add_argument("--training_rounds", type=int, default=40)
    parser.add_argument("--federate_after_n_batches", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save_model", action="store_true")
    parser.add_argument("--verbose", "-v", action="store_true")
    return parser.parse_args(args=args)


async def fit_model_on_worker(worker, traced_model, batch_size, curr_round, max_nr_batches, lr):
    train_config = sy.TrainConfig(
        model=traced_model,
        loss_fn=loss_fn,
        batch_size=batch_size,
        shuffle=True,
        max_nr_batches=max_nr_batches,
        epochs=1,
        optimizer="SGD",
        optimizer_args={"lr": lr},
    )
    train_config.send(worker)
    loss = await worker.async_fit(dataset_key="mnist", return_ids=[0])
    model = train_config.model_ptr.get().obj
    return worker.id, model, loss


def evaluate_model_on_worker(
    model_identifier, worker, dataset_key, model, nr_bins, batch_size, device, print_target_hist=False
):
    model.eval()
    train_config = sy.TrainConfig(
        batch_size=batch_size, model=model, loss_fn=loss_fn, optimizer_args=None, epochs=1
    )
    train_config.send(worker)
    result = worker.evaluate(
        dataset_key=dataset_key,
        return_histograms=True,
        nr_bins=nr_bins,
        return_loss=True,
        return_raw_accuracy=True,
        device=device,
    )
    test_loss = result["loss"]
    correct = result["nr_correct_predictions"]
    len_dataset = result["nr_predictions"]
    hist_pred = np.array(result["histogram_predictions"])
    hist_target = np.array(result["histogram_target"])
    if print_target_hist:
        logger.info("Target histogram: %s", hist_target)
    percentage = [
        round(100 * hist_pred[low:high].sum() / len_dataset) for low, high in ((0, 4), (4, 7), (7, 10))
    ]
    logger.info("%s: Percentage numbers 0-3: %s%%, 4-6: %s%%, 7-9: %s%%", model_identifier, *percentage)
    logger.info(
        "%s: Average loss: %.4f, Accuracy: %s/%s (%.2f%%)",
        model_identifier, test_loss, correct, len_dataset, 100.0 * correct / len_dataset,
    )  # fmt: skip


async def main(args, worker_instances, testing):
    """The rounds of the notebook's last cell; returns the model and the loss of each round."""
    for worker in [*worker_instances, testing]:
        worker.clear_objects_remote()
    torch.manual_seed(args.seed)
    device = "cpu"
    model = Net().to(device)
    traced_model = torch.jit.trace(model, torch.zeros([1, 1, 28, 28], dtype=torch.float).to(device))
    learning_rate = args.lr
    history = []
    for curr_round in range(1, args.training_rounds + 1):
        logger.info("Training round %s/%s", curr_round, args.training_rounds)
        results = await asyncio.gather(
            *[
                fit_model_on_worker(
                    worker=worker,
                    traced_model=traced_model,
                    batch_size=args.batch_size,
                    curr_round=curr_round,
                    max_nr_batches=args.federate_after_n_batches,
                    lr=learning_rate,
                )
                for worker in worker_instances
            ]
        )
        models = {}
        loss_values = {}
        test_models = curr_round % 10 == 1 or curr_round == args.training_rounds
        if test_models:
            logger.info("Evaluating models")
            for worker_id, worker_model, _ in results:
                evaluate_model_on_worker(
                    model_identifier="Model update " + worker_id,
                    worker=testing,
                    dataset_key="mnist_testing",
                    model=worker_model,
                    nr_bins=10,
                    batch_size=args.test_batch_size,
                    print_target_hist=False,
                    device=device,
                )
        for worker_id, worker_model, worker_loss in results:
            if worker_model is not None:
                models[worker_id] = worker_model
                loss_values[worker_id] = worker_loss
        traced_model = utils.federated_avg(models)
        if test_models:
            evaluate_model_on_worker(
                model_identifier="Federated model",
                worker=testing,
                dataset_key="mnist_testing",
                model=traced_model,
                nr_bins=10,
                batch_size=args.test_batch_size,
                print_target_hist=False,
                device=device,
            )
        learning_rate = max(0.98 * learning_rate, args.lr * 0.01)
        history.append({id: loss.item() for id, loss in loss_values.items()})
    return traced_model, history
