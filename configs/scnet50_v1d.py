"""SCNet-50 v1d on ImageNet by a recipe of our own choice: its authors published the weights, but not how they trained them.

Taken from He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019, whose ResNet-D this
network follows: learning rate 0.1 for a batch of 256 and in proportion for others, 5 epochs of warm-up, cosine, 120 epochs (200
there where there is mixup), label smoothing 0.1, mixup with a = 0.2, decay of kernels alone. The average of weights (decay
0.9999) and bfloat16 are additions.

Command    python -m train.main DIR --config configs/scnet50_v1d.py        DIR/train/CLASS/*.JPEG, DIR/val/CLASS/*.JPEG
Hardware   not measured; for several devices: 1,024 images a step
Time       not measured
Result     not measured here; published by the authors, by a recipe that they did not publish: top-1 80.47 %, top-5 95.32 %
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
