"""The tools whose transcripts are known.

Law: light, for it is all of the tools that a process that reads history has to know.
"""

from bridge.tools import claude_code_lines, codex_lines, gemini_lines
from bridge.tools.tool import Transcripts

TRANSCRIPTS: dict[str, Transcripts] = {
    claude_code_lines.TOOL: claude_code_lines.TRANSCRIPTS,
    codex_lines.TOOL: codex_lines.TRANSCRIPTS,
    gemini_lines.TOOL: gemini_lines.TRANSCRIPTS,
}
"""By tool, in the order in which they are looked at."""
