"""Sources of captioned and labelled images, the global order of samples, and batches made from them."""
