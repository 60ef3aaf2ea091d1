"""Learning-rate schedules."""

import optax

from mlm.settings import OptimizerSettings


def create_schedule(settings: OptimizerSettings, *, num_train_steps: int) -> optax.Schedule:
    """Linear warmup from 0 to `learning_rate`, then the decay named by `settings.schedule`.

    With t = (step - warmup_steps) / (num_train_steps - warmup_steps) the rate is learning_rate times

        linear:    1 - t
        cosine:    (1 + cos(pi t)) / 2
        constant:  1

    Returns:
      A function of the number of steps applied so far. The first step of a warmup has rate 0, as in the reference
      script.
    """
    peak, warmup_steps = settings.learning_rate, settings.warmup_steps
    decay_steps = max(1, num_train_steps - warmup_steps)
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    if warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps])
