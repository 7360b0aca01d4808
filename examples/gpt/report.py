"""What a run shows of itself: progress while it trains, a plot of its losses."""

import collections
import contextlib
import io
import time
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

if TYPE_CHECKING:
    from gpt.rundir import History

SECONDS_BETWEEN_LINES = 15.0
RECENT = 20  # the loss shown is a mean over so many steps


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then.

    Speed is that of the training steps since the last report; time inside `paused`,
    and so compilation, validation and checkpoints, does not count.
    """

    def __init__(
        self,
        steps: int,
        first: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak: float | None,
        terminal: bool,
    ):
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._bar = None
        if terminal:
            self._bar = tqdm(
                total=steps,
                initial=first,
                unit="step",
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}]{postfix}",
            )
        self._recent = collections.deque(maxlen=RECENT)
        self._validation: float | None = None
        self._shown_speed = ""
        self._counted = self._busy = 0.0
        self._resumed = self._shown = time.perf_counter()

    def step(self, step: int, loss: float) -> None:
        """Counts a finished step, and shows it when it is time."""
        self._recent.append(loss)
        self._counted += 1
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update()
            if now - self._shown > 0.2:
                self._show_in_bar()
                self._shown = now
        elif now - self._shown > SECONDS_BETWEEN_LINES:
            self._line(step)

    def validated(self, step: int, loss: float) -> None:
        """Shows a validation loss in a line of its own."""
        self._validation = loss
        self._line(step, f"validation {loss:.3f}")

    def say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    @contextlib.contextmanager
    def paused(self):
        """Work that is not training."""
        self._busy += time.perf_counter() - self._resumed
        try:
            yield
        finally:
            self._resumed = time.perf_counter()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, step: int, *more: str) -> None:
        width = len(str(self._steps))
        parts = [f"step {step:{width}}/{self._steps}", self._loss(), *more]
        self.say("  ".join(filter(None, [*parts, self._speed()])))
        self._shown = time.perf_counter()
        if self._bar is not None:
            self._show_in_bar()

    def _show_in_bar(self) -> None:
        assert self._bar is not None
        known = self._validation is not None
        validation = f"validation {self._validation:.3f}" if known else ""
        parts = [self._loss(), validation, self._speed()]
        self._bar.set_postfix_str("  ".join(filter(None, parts)), refresh=False)

    def _loss(self) -> str:
        if not self._recent:
            return ""
        return f"loss {sum(self._recent) / len(self._recent):.3f}"

    def _speed(self) -> str:
        """Tokens per second, and the share of the peak FLOP/s that they use."""
        busy = self._busy + time.perf_counter() - self._resumed
        if self._counted and busy > 0.5:
            speed = self._counted * self._tokens_per_step / busy
            self._shown_speed = f"{speed:,.0f} tokens/s"
            if self._peak is not None:
                utilisation = speed * self._flops_per_token / self._peak
                self._shown_speed += f"  MFU {utilisation:.1%}"
            self._counted = self._busy = 0.0
            self._resumed = time.perf_counter()
        return self._shown_speed


def loss_curves(history: "History", title: str) -> bytes:
    """A PNG of training and validation loss over steps."""
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(history.loss) + 1)
    axes.plot(steps, history.loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(
        steps, _smooth(history.loss), color="tab:blue", label="training, running mean"
    )
    if history.validation_loss:
        axes.plot(
            history.validation_step,
            history.validation_loss,
            "o-",
            color="tab:orange",
            markersize=4,
            label=f"validation, now {history.validation_loss[-1]:.3f}",
        )
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title, xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _smooth(values: list[float]) -> np.ndarray:
    """Mean over the steps up to each one, a fiftieth of the run at most."""
    total = np.cumsum([0.0, *values])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - max(1, len(values) // 50))
    return (total[end] - total[start]) / (end - start)
