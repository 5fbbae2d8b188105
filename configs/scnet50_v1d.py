"""SCNet-50 v1d on ImageNet by our own recipe: the authors published the weights, but not their recipe.

Recipe (He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019, which introduced the
ResNet-D that this network follows): learning rate 0.1 for a batch size of 256 and in proportion for others, 5 epochs of
warm-up, cosine decay, 120 epochs (that paper: 200 with mixup), label smoothing 0.1, mixup with a = 0.2, weight decay only on
kernels. The moving average of the weights (decay 0.9999) and bfloat16 are our additions.

Command    python -m train.main DIR --config configs/scnet50_v1d.py        DIR/train/CLASS/*.JPEG, DIR/val/CLASS/*.JPEG
Hardware   not measured; meant for several devices, 1,024 images per step
Time       not measured
Result     not measured. Published by the authors, with their own recipe: top-1 80.47 %, top-5 95.32 %
"""

from train.config import Augment, Config, Data, Model, Optim

config = Config(
    epochs=120,
    log_every=100,
    model=Model(name="scnet50_v1d", dtype="bfloat16"),
    data=Data(name="folder", image_size=224, batch_size=1024, flip=True, threads=16),
    augment=Augment(mixup=0.2),
    optim=Optim(
        lr=0.1,
        lr_reference_batch=256,
        momentum=0.9,
        weight_decay=1e-4,
        decay_kernels_only=True,
        label_smoothing=0.1,
        schedule="cosine",
        warmup_epochs=5,
        ema=0.9999,
    ),
)
