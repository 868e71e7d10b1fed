"""Document 0: two workers train copies of one model on MNIST side by side; the copies come here and are averaged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

ITEMS, TESTED = 512, 500


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5, 1)
        self.conv2 = nn.Conv2d(10, 20, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 20, 100)
        self.fc2 = nn.Linear(100, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        x = x.view(-1, 4 * 4 * 20)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def averaged_into(model, models):
    for parameter, *others in zip(model.parameters(), *(one.parameters() for one in models), strict=True):
        parameter.set_(sum(one.data for one in others) / len(others))


def test_two_copies_side_by_side(make_worker, mnist_folder):
    workers = make_worker("Bob"), make_worker("Alice")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    whole = datasets.MNIST(str(mnist_folder), train=True, transform=transform)
    torch.manual_seed(1)
    loader = DataLoader(Subset(whole, range(ITEMS)), batch_size=64, shuffle=True)
    model = Net()
    model.train()
    losses = []
    for _ in range(2):
        copies = [model.copy() for _ in workers]
        for copied, worker in zip(copies, workers, strict=True):
            copied.send(worker)
            optimizer = optim.SGD(copied.parameters(), lr=0.05, momentum=0.5)
            for number, (data, target) in enumerate(loader):
                data, target = data.send(worker), target.send(worker)
                optimizer.zero_grad()
                loss = F.nll_loss(copied(data), target)
                loss.backward()
                optimizer.step()
                if number % 5 == 0:
                    losses.append(loss.get().data.item())
        with torch.no_grad():
            for copied in copies:
                copied.get()
            averaged_into(model, copies)
    assert losses[-1] < losses[0]
    test = datasets.MNIST(str(mnist_folder), train=False, transform=transform)
    x = torch.stack([test[index][0] for index in range(TESTED)])
    model.eval()
    with torch.no_grad():
        right = model(x).argmax(1, keepdim=True).eq(test.targets[:TESTED].view(-1, 1)).sum().item()
    assert right > 0.5 * TESTED
