"""Published rewards: human preference (HPSv2.1), image-text agreement (DFN CLIP), ImageNet classes (DINOv2).

Importing a module here loads neither a network library nor a file; `prepare` does.
"""
