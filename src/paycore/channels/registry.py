"""Which channels and accounts are configured: names to adapters, names to small codes for the index."""

from collections.abc import Iterable, Mapping

from paycore.channels.protocol import Channel, ChannelTraits

MAX_ACCOUNT_CODE = 255
_DEFAULT_TRAITS = ChannelTraits()


class ChannelRegistry:
    """The configured channels. ``accounts``: the account names of each channel, in the order of configuration.

    ``traits``: how each wants to be treated, where that differs from the default.

    Raises ValueError when there are more accounts than the index has codes for.
    """

    def __init__(
        self,
        channels: Mapping[str, Channel],
        accounts: Mapping[str, Iterable[str]],
        traits: Mapping[str, ChannelTraits] | None = None,
    ) -> None:
        self._channels = dict(channels)
        self._traits = dict(traits or {})
        pairs = [(channel, account) for channel, names in accounts.items() for account in names]
        if len(pairs) > MAX_ACCOUNT_CODE:
            raise ValueError(f"at most {MAX_ACCOUNT_CODE} accounts can be configured, not {len(pairs)}")
        self._codes = {pair: code for code, pair in enumerate(pairs, start=1)}

    @property
    def codes(self) -> dict[tuple[str, str], int]:
        """The code of each account, by its channel's name and its own."""
        return self._codes

    def has_channel(self, channel: str) -> bool:
        """Whether a channel of this name is configured."""
        return channel in self._channels

    def code(self, channel: str, account: str) -> int:
        """Return the account's code of 1 to 255, or 0 when it is not configured."""
        return self._codes.get((channel, account), 0)

    def traits(self, channel: str) -> ChannelTraits:
        """How a channel wants to be treated; the default for one that says nothing."""
        return self._traits.get(channel, _DEFAULT_TRAITS)

    def channel(self, name: str) -> Channel:
        """Return the adapter of a configured channel. Raises KeyError when there is none."""
        return self._channels[name]

    async def aclose(self) -> None:
        """Close every adapter."""
        for channel in self._channels.values():
            await channel.aclose()
