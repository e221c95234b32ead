"""Sections of model cards, written from recorded facts."""

from collections.abc import Mapping


def mixture_section(
    shares: Mapping[str, float], mixture: Mapping[str, float], inner_steps: int, picture: str | None
) -> str:
    """Write what was learned about the domains.

    Args:
        shares: Share of every domain in the pool; empty where it is not known (streams).
        mixture: Learned weight of every domain.
        inner_steps: Optimizer steps between two updates of the weights.
        picture: File name of the picture of the weights over time, beside the card; None without one.

    Returns:
        Markdown.

    Example:
        >>> print(mixture_section({"web": 0.9, "books": 0.1}, {"web": 0.4, "books": 0.6}, 50, None))
        ## Learned mixture
        <BLANKLINE>
        Learned by hf_bilevel's `MixtureTrainer`, the weights moving every 50 optimizer steps.
        <BLANKLINE>
        | domain | share of the pool | learned weight |
        |---|---|---|
        | books | 0.100 | 0.600 |
        | web | 0.900 | 0.400 |
        <BLANKLINE>
    """
    lines = [
        "## Learned mixture",
        "",
        f"Learned by hf_bilevel's `MixtureTrainer`, the weights moving every {inner_steps} optimizer steps.",
        "",
        "| domain | share of the pool | learned weight |",
        "|---|---|---|",
    ]
    for name, weight in sorted(mixture.items(), key=lambda pair: -pair[1]):
        share = f"{shares[name]:.3f}" if name in shares else ""
        lines.append(f"| {name.replace('|', '&#124;')} | {share} | {weight:.3f} |")
    if picture is not None:
        lines += ["", f"![Weight of every domain over the optimizer steps]({picture})"]
    return "\n".join([*lines, ""])
