"""SCNet-50 on ImageNet by its authors' recipe: PyTorch's ImageNet example with label smoothing and 100 epochs.

Recipe (https://github.com/MCG-NKU/SCNet): SGD with momentum 0.9, weight decay 1e-4 on every parameter, batch size 256, learning
rate 0.1 divided by 10 every 30 of 100 epochs, label smoothing 0.1. Training images: random crops of 8 to 100 % of the area,
resized to 224 px, and mirroring. Test images: shorter side 256 px, central crop of 224 px.

Command    python -m train.main DIR --config configs/scnet50.py        DIR/train/CLASS/*.JPEG, DIR/val/CLASS/*.JPEG
Hardware   not measured
Time       not measured
Result     not measured. Published by the authors: top-1 77.81 %, top-5 93.92 %
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=100,
    log_every=100,
    model=Model(name="scnet50"),
    data=Data(name="folder", image_size=224, batch_size=256, flip=True, threads=8),
    optim=Optim(
        lr=0.1, momentum=0.9, weight_decay=1e-4, label_smoothing=0.1, schedule="step", drop_epochs=(30, 60, 90), drop_factor=0.1
    ),
)
