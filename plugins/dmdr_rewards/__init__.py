"""Published rewards: human preference (HPSv2.1, PickScore, ImageReward), agreement (CLIP), aesthetics, ImageNet labels.

Importing a module here loads neither a network library nor a file; `prepare` does.
"""
