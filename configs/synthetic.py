"""Smoke test: two epochs of a small network on random images, to check an installation.

Command    python -m train.main --config configs/synthetic.py
Hardware   any
Time       not measured
Result     none; the images are noise
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=2,
    model=Model(name="scnet20_small"),
    data=Data(name="synthetic", image_size=16, batch_size=32, synthetic_train=128, synthetic_test=50),
    optim=Optim(lr=0.05),
)
