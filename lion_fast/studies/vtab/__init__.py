"""VTAB-1k as one command: tune on 800 images, choose on 200, train on all 1,000, test once."""

# What the protocol decides, and so neither a grid nor a setting can.
DECIDED = {
    "seed": "--seeds gives them",
    "keep": "the last epoch is kept",
    "early_stop": "all epochs are run",
    "monitor": "the validation accuracy of the last epoch chooses",
}
SEEDS = (42,)
