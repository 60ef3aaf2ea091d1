"""The exported Hugging Face model directory, its model card, the hub, and mask filling."""
