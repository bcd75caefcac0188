#!/bin/sh
# Hook of dracut, sourced to ask whether all has come that is waited for: a crash has to be saved first.
! /vmcapture/busybox sh /vmcapture/hand-over check
