"""Payment channels: one protocol, one adapter a channel, one registry of configured accounts."""
