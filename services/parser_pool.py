"""Parser processes for async code: each reads one file at a time, as many at once as the pool has."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rag.parsing import DocumentParser, ParseLimits
from rag.types import ParsedDocument


class ParserPool:
    def __init__(self, limits: ParseLimits, num_parsers: int) -> None:
        self.num_parsers = num_parsers
        self._parsers = [DocumentParser(limits) for _ in range(num_parsers)]
        self._free: asyncio.Queue[DocumentParser] = asyncio.Queue()
        for parser in self._parsers:
            self._free.put_nowait(parser)

    async def parse(self, path: Path, filename: str) -> ParsedDocument:
        """See `rag.parsing.parse_file`. When cancelled, the parser process is ended with its file."""
        parser = await self._free.get()
        reading = asyncio.create_task(asyncio.to_thread(parser.parse_file, path, filename))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.to_thread(parser.close))
            await asyncio.wait([reading])
            reading.exception()
            raise
        finally:
            self._free.put_nowait(parser)

    def close(self) -> None:
        for parser in self._parsers:
            parser.close()
