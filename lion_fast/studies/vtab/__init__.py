"""VTAB-1k as one command: tune on 800 images, choose on 200, train on all 1,000, test once."""
