"""How many cases a test tries, how they are counted, and values of any kind.

``pytest tests/fuzz --hypothesis-profile=full`` tries more than 10,000; ``HF_BILEVEL_FUZZ_REPORT=cases.json`` counts them.
"""

import datetime
import functools
import math
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CASES: Counter[str] = Counter()

LONGEST_MESSAGE = 10_000


def fuzz(small: int, full: int, *, shrink: bool = True, **strategies: Any) -> Callable[[Callable], Callable]:
    """Try so many cases of a test, or more with the profile ``full``."""
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    num = full if settings.get_current_profile_name() == "full" else small

    def decorate(test: Callable) -> Callable:
        @settings(max_examples=num, suppress_health_check=list(HealthCheck), phases=phases)
        @given(**strategies)
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            test(*args, **kwargs)
            CASES[test.__name__] += 1  # of those that make sense

        return counted

    return decorate


@contextmanager
def bounded(seconds: int = 20, gigabytes: float = 2) -> Iterator[None]:
    """Fail instead of hanging, and instead of filling the memory."""

    def stop(*args: Any) -> None:
        raise AssertionError(f"not done after {seconds} s")

    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(gigabytes * 2**30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def message_of(error: BaseException) -> str:
    """The message of a refusal, which can be printed and read."""
    message = str(error)
    assert len(message) < LONGEST_MESSAGE, message[:300]
    return message


class Opaque:
    """An object that cannot be written or compared."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None


TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            " ",
            "0",
            "-1",
            "1e5",
            "nan",
            "-inf",
            "1e400",
            "1_0",
            "\u0663",
            "None",
            "true",
            "{}",
            "%s%(x)s",
            "x" * 9999,
        ]
    ),
    st.text(st.characters(categories=["Nd", "No", "Nl"]), max_size=4),
)
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, -0.0]),
    st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**400, 1e300, 5e-324, 1e19]),
    st.booleans(),
)


def _nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)


JSON = st.recursive(st.none() | NUMBERS.filter(lambda n: n != n or abs(n) < 10**300) | TEXTS, _nested, max_leaves=8)
ANYTHING = st.one_of(
    st.none(),
    NUMBERS,
    TEXTS,
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Lo"]), max_size=4),
    st.binary(max_size=4),
    st.recursive(st.none() | NUMBERS | TEXTS, _nested, max_leaves=6),
    st.builds(
        lambda make: make(),  # anew for each case
        st.sampled_from(
            [
                Opaque,
                object,
                set,
                lambda: Opaque,
                lambda: np.float32(0.5),
                lambda: np.float64(0.5),
                lambda: np.int64(3),
                lambda: np.array([0.5, 1.0]),
                lambda: np.array("auto"),
                lambda: torch.tensor(0.5),
                lambda: torch.zeros(2, 2),
                lambda: -(10**5000),
                lambda: 1j,
                lambda: [[10**5000]],
                lambda: functools.reduce(lambda inner, _: [inner], range(5000), []),
                lambda: ["x"] * 100_000,
                lambda: datetime.date(2026, 1, 1),
            ]
        ),
    ),
)


def can_be_written(value: Any) -> bool:
    try:
        return len(repr(value)) > 0
    except Exception:
        return False
