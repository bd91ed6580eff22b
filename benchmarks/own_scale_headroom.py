#!/usr/bin/env python
"""
What the other tokens of a scale tell about a token, beyond the state before the scale: all that refinement can learn.

    python benchmarks/own_scale_headroom.py --dataset_name my_images --pretrained_vqvae_name_or_path my-tokenizer \
        --max_train_steps 2000 --folder runs/headroom

Trains a Markov transformer from the start. Half of the images are trained on as ever. Of the others a random share of
every scale's own tokens is shown: the input of a token is its code, or a mark that says it is hidden, beside the state
before the scale, and the loss is that of the hidden ones. On held-out images the loss of the same hidden tokens is
then taken twice, with the others shown and in the ordinary way; the difference is the headroom.

Prints Markdown, nats for each scale and share shown; `--output` takes JSON. `--folder` keeps tokens and, every 250
steps, what the run goes on from.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import device_name, write_results
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.console import write_text
from srdd.data.images import load_labelled_images, validation_images
from srdd.data.token_cache import TokenDataset, cached_tokens
from srdd.evaluation.tables import markdown_table
from srdd.scales import num_tokens_per_scale
from srdd.training.optimizer import make_optimizer, parameter_groups
from srdd.training.settings import OptimizationSettings


STEPS_BETWEEN_SAVES = 250


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="As in `train_srdd.py`.")
    parser.add_argument("--pretrained_vqvae_name_or_path", required=True, help="Folder or Hub id of the tokenizer.")
    parser.add_argument("--folder", type=Path, required=True, help="For tokens and the state of the run.")
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="Shown at the end.")
    parser.add_argument("--num_images", type=int, default=1024, help="Held-out images.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file for all that was measured.")
    return parser.parse_args(arguments)


class Probe:
    """
    A Markov transformer that may see tokens of its own scale. Its input has three parts: the state before the scale,
    the codes of the tokens shown, and 1 where a token is hidden. In the ordinary way the last two are zero.
    """

    def __init__(self, args: argparse.Namespace, vqvae: MultiScaleVQModel, num_classes: int):
        torch.manual_seed(args.seed)
        self.args = args
        self.device = torch.device(args.device)
        self.vqvae = vqvae
        self.counts = num_tokens_per_scale(vqvae.config.scale_sizes)
        self.model = ScaleTransformer2DModel(
            codebook_size=vqvae.config.codebook_size,
            latent_channels=2 * vqvae.config.latent_channels + 1,
            scale_sizes=vqvae.config.scale_sizes,
            num_layers=args.num_layers,
            num_attention_heads=args.num_attention_heads,
            num_classes=num_classes,
            shared_adaln=True,
        ).to(self.device)
        settings = OptimizationSettings(learning_rate=args.learning_rate, max_train_steps=args.max_train_steps)
        parameters = parameter_groups(self.model, settings.adam_weight_decay)
        self.optimizer, self.schedule = make_optimizer(settings, parameters, device=self.device)

    def hide(self, shares: torch.Tensor, generator: torch.Generator | None = None) -> torch.BoolTensor:
        """Which tokens are hidden `(B, N)`, when a share of each image's tokens, `(B,)`, is shown."""
        hidden = torch.rand(len(shares), sum(self.counts), generator=generator) >= shares[:, None]
        return hidden.to(self.device)

    def losses(
        self, token_ids: torch.LongTensor, labels: torch.LongTensor, hidden: torch.BoolTensor, sees: torch.BoolTensor
    ) -> torch.Tensor:
        """Cross-entropy of all tokens `(B, N)`; of images where `sees` `(B,)`, those not `hidden` are shown."""
        state = self.vqvae.teacher_forcing_inputs(token_ids)  # (B, N, C)
        seen, codes = sees[:, None, None].float(), self.vqvae.quantize.codebook(token_ids)
        marks = hidden[:, :, None].float()
        inputs = torch.cat([state, codes * (1 - marks) * seen, marks * seen], dim=-1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16"):
            logits = self.model(inputs, class_labels=labels).sample
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), token_ids.flatten(), reduction="none")
        return losses.view_as(token_ids)

    def train_step(self, batch: dict) -> float:
        """One step: half of the images see a part of their own scales, and only their hidden tokens count."""
        token_ids, labels = batch["token_ids"].to(self.device), batch["conditions"]["class_labels"].to(self.device)
        sees = (torch.arange(len(labels)) % 2 == 1).to(self.device)
        hidden = self.hide(torch.rand(len(labels)))
        counted = hidden | ~sees[:, None]
        loss = (self.losses(token_ids, labels, hidden, sees) * counted).sum() / counted.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.item()

    def state(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state(self, state: dict) -> None:
        for name, values in state.items():
            getattr(self, name).load_state_dict(values)

    @torch.no_grad()
    def headroom(self, tokens: TokenDataset, share: float) -> tuple[list[float], list[float]]:
        """Loss of hidden held-out tokens for every scale: the ordinary one, and with `share` of the tokens shown."""
        self.model.eval()
        generator, sums = torch.Generator().manual_seed(self.args.seed), torch.zeros(3, len(self.counts))
        for batch in torch.utils.data.DataLoader(tokens, batch_size=self.args.train_batch_size):
            token_ids, labels = batch["token_ids"].to(self.device), batch["conditions"]["class_labels"].to(self.device)
            hidden = self.hide(torch.full((len(labels),), share), generator)
            sees = torch.ones(len(labels), dtype=torch.bool, device=self.device)
            ordinary, shown = (self.losses(token_ids, labels, hidden, each) for each in (~sees, sees))
            for row, values in zip(sums, (ordinary * hidden, shown * hidden, hidden.float())):
                row += torch.stack([part.sum() for part in values.split(self.counts, dim=1)]).cpu()
        return (sums[0] / sums[2]).tolist(), (sums[1] / sums[2]).tolist()


def batches(args: argparse.Namespace, tokens: TokenDataset, first_step: int) -> Iterator[dict]:
    """The batches of the steps that are left, every epoch shuffled anew."""
    generator, step = torch.Generator().manual_seed(args.seed), 0
    while True:
        loader = torch.utils.data.DataLoader(
            tokens, args.train_batch_size, shuffle=True, drop_last=True, generator=generator
        )
        for batch in loader:
            step += 1
            if step > args.max_train_steps:
                return
            if step > first_step:
                yield batch


def train(args: argparse.Namespace, probe: Probe, tokens: TokenDataset) -> None:
    """Train a probe, from where the folder left it."""
    saved, step = args.folder / "probe.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True, map_location=args.device)
        step = state.pop("step")
        probe.load_state(state)
    torch.manual_seed(args.seed + step)
    progress = tqdm(batches(args, tokens, step), initial=step, total=args.max_train_steps)
    for step, batch in enumerate(progress, start=step + 1):
        probe.model.train()
        progress.set_postfix(loss=f"{probe.train_step(batch):.3f}")
        if step % STEPS_BETWEEN_SAVES == 0 or step == args.max_train_steps:
            torch.save({"step": step, **probe.state()}, saved)


def run(args: argparse.Namespace) -> list[dict]:
    """Train, and measure every share."""
    images = load_labelled_images(dataset_name=args.dataset_name)
    vqvae = MultiScaleVQModel.from_pretrained(args.pretrained_vqvae_name_or_path)
    vqvae.requires_grad_(False).eval().to(args.device)
    tokens = cached_tokens(vqvae, images, images.train, args.folder)
    held_out = cached_tokens(vqvae, images, validation_images(images, args.num_images), args.folder)
    probe = Probe(args, vqvae, len(images.id2label))
    train(args, probe, tokens)
    rows = []
    for share in args.shares:
        ordinary, shown = probe.headroom(held_out, share)
        rows.append({"share": share, "ordinary": ordinary, "shown": shown})
    return rows


def report(args: argparse.Namespace, rows: list[dict], scale_names: list[str]) -> str:
    """Markdown."""
    introduction = (
        f"Held-out tokens of {args.num_images} images, nats: the loss without tokens of the own scale, and how much"
        f" lower it is with a share of them shown. {args.num_layers} layers, {args.max_train_steps} steps of"
        f" {args.train_batch_size}, {device_name(torch.device(args.device))}, torch {torch.__version__}, seed"
        f" {args.seed}."
    )
    lines = [("loss", *(f"{value:.2f}" for value in rows[0]["ordinary"]))]
    for row in rows:
        differences = (before - after for before, after in zip(row["ordinary"], row["shown"]))
        lines.append((f"{row['share']:.0%} shown", *(f"{value:.3f}" for value in differences)))
    return f"{introduction}\n\n{markdown_table(('', *scale_names), lines)}"


def main(args: argparse.Namespace) -> None:
    rows = run(args)
    sizes = MultiScaleVQModel.load_config(args.pretrained_vqvae_name_or_path)["scale_sizes"]
    write_text(report(args, rows, [f"{height}x{width}" for height, width in sizes]))
    write_results(args, rows, torch.device(args.device))


if __name__ == "__main__":
    main(parse_args())
