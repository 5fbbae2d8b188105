"""SCNet-50 with the authors' ImageNet weights on images of your own: a start for settings, not the last word on them.

Everything is trained, from a tenth of the learning rate of SCNet-50's own training on; the head is drawn anew where the number
of classes differs.
Other weights and their network: `--init FILE -a NAME`.

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
