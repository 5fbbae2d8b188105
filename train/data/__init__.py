"""Images: data sets by name, the order of a run, decoding, augmentation on the device."""
