"""SCNet-20 for small images on real handwritten digits: the job that `python -m train.main` runs by itself.

Command    python -m train.main
Hardware   not measured
Time       not measured
Result     not measured
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=12,
    log_every=11,
    model=Model(name="scnet20_small"),
    data=Data(name="digits", image_size=32, batch_size=32, crop_padding=4),
    optim=Optim(lr=0.1, weight_decay=5e-4, label_smoothing=0.1, schedule="cosine", warmup_epochs=1),
)
