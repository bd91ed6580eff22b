import argparse

import torch

from srdd.console import write_text
from srdd.evaluation.tables import markdown_table
from srdd.models import ATTENTION_PATTERNS
from srdd.theory.discrete_diffusion import verify_proposition_1
from srdd.theory.pyramid_space import enumerate_pyramids, example_models


INTRODUCTION = """\
# Is a scale-wise model a discrete diffusion?

Proposition 1, computed over all {num_pyramids} pyramids of a tiny tokenizer for {num_models} random models, in nats.

- joints: largest difference between the log-probabilities of a path under the model and under the diffusion (part 1).
- bound - loss: of the first model; its spread over all models is 0 if it is a constant (part 2), which is then the
  predicted one, minus the entropy of the forward chain.
- network: largest difference between what the network predicts from the history and from the state alone.
"""

COLUMNS = "attention, states of the chain, histories that meet, joints, bound - loss, spread, predicted, network"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m srdd.theory",
        description="Compute both sides of the paper's Proposition 1 and write a Markdown table of the differences.",
    )
    parser.add_argument("--num-models", type=int, default=8, help="Random models per row.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of codes, data and weights.")
    args = parser.parse_args(arguments)
    if args.num_models < 1:
        parser.error(f"--num-models must be at least 1, got {args.num_models}")
    lines = []
    for states, histories_meet in (("latents", True), ("latents", False), ("tokens", True)):
        for pattern in ATTENTION_PATTERNS:
            generator = torch.Generator().manual_seed(args.seed)
            vqvae, transformer = example_models(pattern, histories_meet, generator)
            check = verify_proposition_1(
                vqvae, transformer, states=states, num_models=args.num_models, generator=generator
            )
            histories = enumerate_pyramids(vqvae, "tokens").num_states
            meeting = sum(histories[:-1]) - sum(check.num_states[:-1])
            texts = (
                f"{check.joint_difference:.1e}",
                f"{check.gaps[0]:.6f}",
                f"{check.gap_spread:.1e}",
                f"{0 - check.forward_entropy:.6f}",
                f"{check.network_difference:.1e}",
            )
            lines.append((pattern, states, meeting, *texts))
    introduction = INTRODUCTION.format(num_pyramids=check.num_pyramids, num_models=args.num_models)
    write_text(introduction + "\n" + markdown_table(COLUMNS.split(", "), lines))


if __name__ == "__main__":
    main()
