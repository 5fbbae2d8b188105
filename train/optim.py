"""The optimizer and its schedule, from optax's parts."""

from typing import Any

import jax
import optax

from train.config import Optim, Plan


def make_schedule(optim: Optim, plan: Plan) -> optax.Schedule:
    """Step → learning rate: a linear rise over the warm-up, then a cosine down to 0, or drops."""
    after_warmup = plan.total_steps - plan.warmup_steps
    if optim.schedule == "cosine":
        fall = optax.cosine_decay_schedule(plan.peak_lr, after_warmup)
    else:
        drops = {step - plan.warmup_steps: optim.drop_factor for step in plan.drop_steps}
        fall = optax.piecewise_constant_schedule(plan.peak_lr, drops)
    rise = optax.linear_schedule(0.0, plan.peak_lr, plan.warmup_steps)
    return optax.join_schedules([rise, fall], [plan.warmup_steps])


def make_optimizer(optim: Optim, schedule: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """The optimizer of the config, for gradients that are the mean over the whole batch.

    SGD is PyTorch's: the decay is part of the gradient, so it passes through the momentum. LARS is optax's; biases and what
    norms scale and shift by are neither decayed nor adapted by it, as its authors and those who use it do.
    """
    if optim.name == "lars":
        rule = optax.lars(
            schedule, optim.weight_decay, weight_decay_mask=is_kernel, trust_ratio_mask=is_kernel, momentum=optim.momentum
        )
    else:
        decay = optax.add_decayed_weights(optim.weight_decay, mask=is_kernel if optim.decay_kernels_only else None)
        rule = optax.chain(decay, optax.sgd(schedule, momentum=optim.momentum))
    # Clipped or not, the state has the same structure: a run may go on with another setting.
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(), rule)


def is_kernel(params: Any) -> Any:
    """Tree of params → tree of bool: True for convolutions' and matrix products' kernels, which alone have several dimensions."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
