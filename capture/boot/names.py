"""What the files of a saved crash are called: for those who write them, make room among them, or show them."""

from capture.dumpfile.encrypted import SUFFIX

LOG = "vmcore-dmesg.txt"
REGISTERS_TEXT, REGISTERS = "registers.txt", "registers.json"
DUMP = "vmcore"
ENCRYPTED_DUMP = f"vmcore.flat{SUFFIX}"
