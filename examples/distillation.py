"""Knowledge distillation: a small network of ScConv learns from a converted PyTorch network, without labels.

The teacher comes from a file with PyTorch's keys and layout: `load_weights` converts it to variables and reports
every entry that does not fit. The student learns the teacher's softened outputs (Hinton, Vinyals, Dean, "Distilling
the Knowledge in a Neural Network", 2015).

So that the example runs anywhere, it first trains the teacher and writes that file itself. With a published file, the
teacher would be `scconv_jax.load_model("scnet50-dc6a7e87.pth")`.

Command    python examples/distillation.py [--small]
Time       --small: 24 s on two cores of an AMD EPYC. Full form: not measured
Result     --small, seed 0, on digits that were not trained on: the teacher has 114,746 parameters and 96.7 % right, the student
           21,530 and 92.5 %
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import scconv_jax
from scconv_jax.models import NARROW, Bottleneck, ResNet

TEMPERATURE = 3.0
# Initial values are computed once: a program that compiles quickly is better than a fast one.
QUICK = {"xla_backend_optimization_level": 0}


def train(model, loss, images, targets, steps, batch=64):
    """Returns the variables of a network after `steps` steps. `loss(logits, targets)` gives the loss of each image."""
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def step(variables, momentum, images, targets):
        def mean(params):
            logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return loss(logits, targets).mean(), new

        (value, new), gradient = jax.value_and_grad(mean, has_aux=True)(variables["params"])
        updates, momentum = optimiser.update(gradient, momentum, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, momentum, value

    variables = jax.jit(partial(model.init, train=False), compiler_options=QUICK)(jax.random.key(0), images[:1])
    momentum, generator = jax.jit(optimiser.init)(variables["params"]), np.random.default_rng(0)
    for i in range(steps):
        chosen = generator.choice(len(images), batch, replace=False)
        variables, momentum, value = step(variables, momentum, images[chosen], targets[chosen])
        if i % 20 == 0:
            print(f"step {i:4}   loss {float(value):.3f}")
    return variables


def distance(logits, teacher):
    """Returns the Kullback-Leibler divergence of softened probabilities, times T², so that its gradient does not depend on T."""
    student = jax.nn.log_softmax(logits / TEMPERATURE)
    return TEMPERATURE**2 * optax.kl_divergence(student, jax.nn.softmax(teacher / TEMPERATURE))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small networks and few steps")
    options = parser.parse_args(arguments)
    blocks, steps = (1, 100) if options.small else (3, 1000)

    digits = load_digits()
    images, labels = digits.images.astype(np.float32)[..., None] / 16, digits.target
    seen, unseen = slice(1437), slice(1437, None)
    options_of = {**NARROW, "in_channels": 1, "output_stride": 2}
    teacher = ResNet(Bottleneck, (blocks, blocks), **{**options_of, "planes": (32, 64)})
    student = ResNet(partial(Bottleneck, conv=scconv_jax.ScConv), (1, 1), **{**options_of, "planes": (16, 32)})

    print("the teacher, with labels:")
    trained = train(teacher, optax.softmax_cross_entropy_with_integer_labels, images[seen], labels[seen], steps)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.pth"
        scconv_jax.save(file, trained)  # what torch.save(network.state_dict(), file) writes
        template = jax.eval_shape(partial(teacher.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        converted, notes = scconv_jax.load_weights(file, template)
    print("converted from PyTorch:", *(notes or ["every entry fits"]))
    knowledge = np.asarray(jax.jit(partial(teacher.apply, train=False))(converted, images))

    print("the student, without labels:")
    learned = train(student, distance, images[seen], knowledge[seen], steps)
    answers = np.asarray(jax.jit(partial(student.apply, train=False))(learned, images[unseen])).argmax(1)
    right = {"teacher": knowledge[unseen].argmax(1) == labels[unseen], "student": answers == labels[unseen]}
    accuracy = {name: float(values.mean()) for name, values in right.items()}
    size = {name: sum(x.size for x in jax.tree.leaves(v["params"])) for name, v in (("teacher", trained), ("student", learned))}
    for name in accuracy:
        print(f"{name}: {size[name]:,} parameters, {accuracy[name]:.1%} of the unseen digits right")
    same = jax.tree.map(np.array_equal, trained, converted)
    return {"accuracy": accuracy, "parameters": size, "converted": same}


if __name__ == "__main__":
    main()
