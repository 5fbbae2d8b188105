"""SCNet-101 on ImageNet by its authors' recipe, the same as for SCNet-50; configs/scnet50.py describes it.

Command    python -m train.main DIR --config configs/scnet101.py        DIR/train/CLASS/*.JPEG, DIR/val/CLASS/*.JPEG
Hardware   not measured
Time       not measured
Result     not measured. Published by the authors: top-1 78.94 %, top-5 94.25 %
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=100,
    log_every=100,
    model=Model(name="scnet101"),
    data=Data(name="folder", image_size=224, batch_size=256, flip=True, threads=8),
    optim=Optim(
        lr=0.1, momentum=0.9, weight_decay=1e-4, label_smoothing=0.1, schedule="step", drop_epochs=(30, 60, 90), drop_factor=0.1
    ),
)
