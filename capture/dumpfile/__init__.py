"""The kdump-compressed format: its structures, codecs, writer and reader."""
