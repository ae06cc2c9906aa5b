"""CHAIR: which of COCO's 80 objects captions mention, and whether they are in the image."""
