"""vlmdpo: Direct Preference Optimization for vision-language models, from data to proof."""

__version__ = "0.1.1"
