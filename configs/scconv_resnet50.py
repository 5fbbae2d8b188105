"""ResNet-50 of ScConv (2023) on ImageNet by the recipe of its paper, as far as that gives one.

From Li, Wen, He, CVPR 2023: learning rate 0.1 divided by 10 every 30 of 100 epochs, weight decay 1e-4. Momentum 0.9, batch 256,
crops and mirroring are those of PyTorch's ImageNet example; the paper does not say.

Command    python -m train.main DIR --config configs/scconv_resnet50.py        DIR/train/CLASS/*.JPEG, DIR/val/CLASS/*.JPEG
Hardware   not measured
Time       not measured
Result     not measured here; published (a = 1/2): top-1 76.41 %, and 76.15 % for the plain ResNet-50 (-a resnet50)
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=100,
    log_every=100,
    model=Model(name="scconv_resnet50"),
    data=Data(name="folder", image_size=224, batch_size=256, flip=True, threads=8),
    optim=Optim(lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="step", drop_epochs=(30, 60, 90), drop_factor=0.1),
)
