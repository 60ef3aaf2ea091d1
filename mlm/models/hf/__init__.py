"""The Hugging Face side of the models: tensor names, weights, pretrained weights."""
