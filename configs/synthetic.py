"""A smoke test: two epochs of a small network on noise, to see that everything works on a new machine.

Command    python -m train.main --config configs/synthetic.py
Hardware   any
Time       not measured
Result     of no meaning
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=2,
    model=Model(name="scnet20_small"),
    data=Data(name="synthetic", image_size=16, batch_size=32, synthetic_train=128, synthetic_test=50),
    optim=Optim(lr=0.05),
)
