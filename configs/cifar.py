"""CIFAR-10 and CIFAR-100 by the recipe of the 2023 paper.

Recipe (Li, Wen, He, CVPR 2023): SGD with momentum 0.9, learning rate 0.05 divided by 10 at epochs 100 and 150 of 200, weight
decay 5e-4, batch size 128. The paper does not describe the augmentation; 4 px of padding, random crop and mirroring are usual
for CIFAR. Pixels are normalised by the mean and standard deviation of CIFAR-10's training images.

Images: a folder of 32 px PNG files, DIR/train/CLASS/*.png and DIR/val/CLASS/*.png. For a data set prepared by TensorFlow
Datasets in array_record: `--data.name tfds --data.tfds-name cifar10` (or cifar100), and `--data.dir` with the folder of all
data sets. Network: `-a` with resnet56_small, resnet50_small, resnext29_small, wrn28_10_small or densenet121_small, or one of
these names after scconv_.

Command    python -m train.main DIR --config configs/cifar.py -a scconv_resnet50_small
Hardware   not measured
Time       not measured
Result     not measured. Published for CIFAR-10 and CIFAR-100, without → with ScConv:
           ResNet-56 93.27 71.50 → 94.12 72.56 %, ResNet-50 95.09 78.60 → 95.92 79.89 %, ResNeXt-29 95.68 81.54 → 96.20 82.56 %,
           WRN-28-10 95.21 79.40 → 95.64 80.83 %, DenseNet-121 95.09 79.43 → 95.37 80.24 %
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=200,
    log_every=50,
    model=Model(name="scconv_resnet50_small"),
    data=Data(
        name="folder",
        image_size=32,
        resize=32,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        crop_padding=4,
        flip=True,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        batch_size=128,
        threads=4,
    ),
    optim=Optim(lr=0.05, momentum=0.9, weight_decay=5e-4, schedule="step", drop_epochs=(100, 150), drop_factor=0.1),
)
