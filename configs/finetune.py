"""SCNet-50 with the authors' ImageNet weights, fine-tuned on your own images. The settings are a starting point.

All layers are trained, at a tenth of SCNet-50's learning rate. The head is initialised if the
number of classes differs. For other weights and their network: `--init FILE -a NAME`.

Command    python -m train.main DIR --config configs/finetune.py        DIR/train/CLASS/*, DIR/val/CLASS/*
Hardware   not measured
Time       not measured
Result     not measured
"""

from train.config import Config, Data, Model, Optim

config = Config(
    epochs=30,
    log_every=20,
    model=Model(name="scnet50", init="pretrained"),
    data=Data(name="folder", image_size=224, batch_size=64, flip=True, threads=4),
    optim=Optim(lr=0.01, momentum=0.9, weight_decay=1e-4, label_smoothing=0.1, schedule="cosine", warmup_epochs=1),
)
