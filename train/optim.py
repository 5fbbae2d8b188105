"""The optimizer and its learning-rate schedule, built from optax."""

from typing import Any

import jax
import optax

from train.config import Optim, Plan


def make_schedule(optim: Optim, plan: Plan) -> optax.Schedule:
    """Return step → learning rate: a linear warm-up, then a cosine decay to 0 or the drops of the step schedule."""
    after_warmup = plan.total_steps - plan.warmup_steps
    if optim.schedule == "cosine":
        fall = optax.cosine_decay_schedule(plan.peak_lr, after_warmup)
    else:
        drops = {step - plan.warmup_steps: optim.drop_factor for step in plan.drop_steps}
        fall = optax.piecewise_constant_schedule(plan.peak_lr, drops)
    rise = optax.linear_schedule(0.0, plan.peak_lr, plan.warmup_steps)
    return optax.join_schedules([rise, fall], [plan.warmup_steps])


def make_optimizer(optim: Optim, schedule: optax.ScalarOrSchedule, frozen: Any = None) -> optax.GradientTransformation:
    """Return the config's optimizer, for gradients averaged over the global batch.

    SGD follows PyTorch: weight decay is added to the gradient before the momentum. So does AdamW, whose decay is the rate times
    the parameter. LARS and LAMB are optax's; as in common practice, they do not decay biases and the parameters of norms, and
    LARS does not adapt them either.

    Args:
        optim: The settings.
        schedule: Learning rate, or function from the step to it.
        frozen: Tree of bool like the parameters: True for those that stay as they are, which have no state. If None, none.
    """
    kernels = is_kernel if optim.decay_kernels_only else None
    betas = dict(zip(("b1", "b2"), optim.betas, strict=True))
    if optim.name == "adamw":
        rule = optax.adamw(schedule, **betas, weight_decay=optim.weight_decay, mask=kernels)
    elif optim.name == "lamb":
        rule = optax.lamb(schedule, **betas, weight_decay=optim.weight_decay, mask=is_kernel)
    elif optim.name == "lars":
        rule = optax.lars(
            schedule, optim.weight_decay, weight_decay_mask=is_kernel, trust_ratio_mask=is_kernel, momentum=optim.momentum
        )
    else:
        decay = optax.add_decayed_weights(optim.weight_decay, mask=kernels)
        rule = optax.chain(decay, optax.sgd(schedule, momentum=optim.momentum))
    # The state has the same structure with and without clipping, so a resumed run may change the setting.
    rule = optax.chain(optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(), rule)
    return rule if frozen is None else optax.selective_transform(rule, freeze_mask=frozen)


def at_step(opt_state: Any, step: Any) -> Any:
    """Return the state of a new optimizer whose schedule is at a later step. Averages still begin anew, with their own count."""
    return optax.tree_utils.tree_set(opt_state, lambda path, _: "ScaleBySchedule" in str(path[-1]), count=step)


def is_kernel(params: Any) -> Any:
    """Return a tree of bool: True for kernels, the only parameters with more than one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
