"""Hand-written digits, in the style of the first example that everybody runs: a small network, epoch after epoch.

    python examples/scripts/digits.py

`digits_federated.py` is the same script as a trainer of a federation; docs/own-training.md shows what differs.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

from fedsplit import Trainer, keep


class Digits(Dataset):
    """Images of 8 x 8 pixels; for training each is moved by up to one pixel."""

    def __init__(self, images, labels, move=False):
        self.images, self.labels, self.move = images, labels, move

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.move:
            down, right = torch.randint(3, (2,)).tolist()
            image = functional.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return image, self.labels[index]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(512, 64)
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        x = self.dropout1(functional.max_pool2d(x, 2)).flatten(1)
        x = self.dropout2(functional.relu(self.fc1(x)))
        return functional.log_softmax(self.fc2(x), dim=1)


def train(args, model, device, loader, optimizer):
    model.train()
    for batch, (images, labels) in enumerate(loader):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = functional.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        if batch % args.log_interval == 0:
            print(f"train: {batch * args.batch_size} of {len(loader.dataset)}, loss {loss.item():.4f}")
        if args.dry_run:
            break


def test(model, device, loader):
    model.eval()
    loss = correct = 0
    with torch.no_grad():
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            output = model(images)
            loss += functional.nll_loss(output, labels, reduction="sum").item()
            correct += (output.argmax(dim=1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=int, default=1, help="whose images to train on (default: 1)")
    parser.add_argument("--sites", type=int, default=2, help="among how many they are divided (default: 2)")
    parser.add_argument("--batch-size", type=int, default=32, help="for training (default: 32)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of training (default: 5)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default: 0.003)")
    parser.add_argument("--gamma", type=float, default=0.9, help="what it is multiplied with each epoch (default: 0.9)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the images (default: 0)")
    parser.add_argument("--log-interval", type=int, default=10, help="batches between two lines (default: 10)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="train on one batch an epoch")
    parser.add_argument("--save-model", action="store_true", help="write digits.pt at the end")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    mine = slice(args.site - 1, 1400, args.sites)
    train_set, test_set = Digits(images[mine], labels[mine], move=True), Digits(images[1400:], labels[1400:])
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True, num_workers=args.workers)
    test_loader = DataLoader(test_set, batch_size=200)

    model = Net().to(device)
    optimizer = optim.Adam(model.parameters(), lr=args.lr)
    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    kept = keep(optimizer=optimizer, scheduler=scheduler)
    with Trainer(args.site, model) as trainer:
        for task in trainer:
            task.load_into(model)
            kept.restore(task)
            if task.kind == "train":
                train(args, model, device, train_loader, optimizer)
                scheduler.step()
                task.reply(model, num_examples=len(train_set), local_state=kept)
            else:
                loss, accuracy = test(model, device, test_loader)
                print(f"test: loss {loss:.4f}, accuracy {accuracy:.4f}")
                task.reply(loss=loss, num_examples=len(test_set), metrics={"accuracy": accuracy})

    if args.save_model:
        torch.save(model.state_dict(), "digits.pt")


if __name__ == "__main__":
    main()
