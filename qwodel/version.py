"""The release; its own module, so that what stands below the public names can say it."""

__version__ = "2.0.0.dev0"
