"""ScConv-ResNet-50 (2023) on ImageNet by the recipe of its paper, which is incomplete.

Recipe (Li, Wen, He, CVPR 2023): learning rate 0.1 divided by 10 every 30 of 100 epochs, weight decay 1e-4. The paper does not
state momentum, batch size or augmentation; momentum 0.9, batch size 256, crops and mirroring come from PyTorch's ImageNet
example.

Command    python -m train.main DIR --config configs/scconv_resnet50.py        DIR/train/CLASS/*.JPEG, DIR/val/CLASS/*.JPEG
Hardware   not measured
Time       not measured
Result     not measured. Published for a = 1/2: top-1 76.41 %, and 76.15 % for the plain ResNet-50 (-a resnet50)
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=100,
    log_every=100,
    model=Model(name="scconv_resnet50"),
    data=Data(name="folder", image_size=224, batch_size=256, flip=True, threads=8),
    optim=Optim(lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="step", drop_epochs=(30, 60, 90), drop_factor=0.1),
)
