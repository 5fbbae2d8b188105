"""The optimizer and its schedule, from optax's parts."""

import optax

from train.config import Optim, Plan


def make_schedule(optim: Optim, plan: Plan) -> optax.Schedule:
    """Step → learning rate: a linear rise over the warm-up, then a cosine down to 0, or drops."""
    after_warmup = plan.total_steps - plan.warmup_steps
    if optim.schedule == "cosine":
        fall = optax.cosine_decay_schedule(optim.lr, after_warmup)
    else:
        drops = {step - plan.warmup_steps: optim.drop_factor for step in plan.drop_steps}
        fall = optax.piecewise_constant_schedule(optim.lr, drops)
    rise = optax.linear_schedule(0.0, optim.lr, plan.warmup_steps)
    return optax.join_schedules([rise, fall], [plan.warmup_steps])


def make_optimizer(optim: Optim, schedule: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """PyTorch's SGD: the decay is part of the gradient, so it passes through the momentum."""
    return optax.chain(
        optax.add_decayed_weights(optim.weight_decay),
        optax.sgd(schedule, momentum=optim.momentum),
    )
