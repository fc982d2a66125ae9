/*
 * A boot sector that tests the disk it was booted from, through the BIOS.
 * That SeaBIOS boots it shows that the disk has 512-byte logical blocks that a
 * firmware can use.
 *
 * boot.img is two sectors, for the start of the disk:
 *
 *   sector 0   this program
 *   sector 1   256 little-endian 16-bit words: word i is 0xa500 + i
 *
 * It reads sector 1 (int 13h, AH=42h) and compares it; then for sectors 2, 9
 * and 2047 in turn it writes (AH=43h), clears the buffer, reads again, and
 * compares: word i of sector n is 0x5a00 + n + i. None of the three fills a 4 KiB
 * block, and sector 1 and the rest must survive, which the host can see.
 *
 * Prints `BOOT OK` or `BOOT FAIL c` on the first serial port, c being the place
 * that failed, and leaves QEMU through isa-debug-exit with 0x10 or 0x11 (QEMU's
 * own exit status is 33 or 35); without that device it halts.
 */
	.code16
	.text
	.globl _start

	.set BUFFER, 0x8000
	.set SERIAL, 0x3f8
	.set DEBUG_EXIT, 0xf4

_start:
	ljmp	$0, $(0x7c00 + begin - _start)
begin:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x7c00, %sp
	sti
	cld
	movb	%dl, 0x7c00 + drive - _start

	movb	$'E', %bl		/* no int 13h extensions */
	pushw	%bx
	movb	$0x41, %ah
	movw	$0x55aa, %bx
	int	$0x13
	setc	%al
	cmpw	$0xaa55, %bx
	popw	%bx
	jne	failed
	testb	%al, %al
	jnz	failed

	movb	$'R', %bl		/* sector 1: read, compare */
	movw	$1, %si
	movb	$0x42, %ah
	call	transfer
	jc	failed
	movb	$'P', %bl
	movw	$0xa500, %ax
	call	compare
	jne	failed

	movw	$(0x7c00 + sectors - _start), %bp
next:
	movw	(%bp), %si
	testw	%si, %si
	jz	passed
	addw	$2, %bp

	leaw	0x5a00(%si), %ax	/* write the pattern */
	movw	$BUFFER, %di
	movw	$256, %cx
1:	stosw
	incw	%ax
	loop	1b
	movb	$'W', %bl
	movb	$0x43, %ah
	call	transfer
	jc	failed

	movw	$BUFFER, %di		/* what is compared must have been read */
	movw	$256, %cx
	xorw	%ax, %ax
	rep stosw
	movb	$'A', %bl
	movb	$0x42, %ah
	call	transfer
	jc	failed
	movb	$'C', %bl
	leaw	0x5a00(%si), %ax
	call	compare
	je	next

failed:
	movb	%bl, 0x7c00 + place - _start
	movw	$(0x7c00 + bad - _start), %si
	movb	$0x11, %bl
	jmp	end
passed:
	movw	$(0x7c00 + good - _start), %si
	movb	$0x10, %bl
end:
	lodsb
	testb	%al, %al
	jz	2f
	movb	%al, %cl
	movw	$(SERIAL + 5), %dx	/* wait for room in the UART */
1:	inb	%dx, %al
	testb	$0x20, %al
	jz	1b
	movw	$SERIAL, %dx
	movb	%cl, %al
	outb	%al, %dx
	jmp	end
2:	movb	%bl, %al
	outb	%al, $DEBUG_EXIT
3:	hlt
	jmp	3b

/* AH: 42h read, 43h write; SI: the sector. Carry: failed. Keeps SI, BP, BX. */
transfer:
	pushw	%si
	pushw	%bp
	pushw	%bx
	movw	%si, 0x7c00 + packet_sector - _start
	movw	$(0x7c00 + packet - _start), %si
	movb	0x7c00 + drive - _start, %dl
	xorb	%al, %al
	int	$0x13
	popw	%bx
	popw	%bp
	popw	%si
	ret

/* Is word i of the buffer AX + i? Zero flag: yes. */
compare:
	pushw	%si
	movw	$BUFFER, %di
	movw	$256, %cx
1:	scasw
	jne	2f
	incw	%ax
	loop	1b
	cmpw	%ax, %ax
2:	popw	%si
	ret

good:	.asciz	"BOOT OK\n"
bad:	.ascii	"BOOT FAIL "
place:	.asciz	"?\n"
drive:	.byte	0
sectors: .word	2, 9, 2047, 0
packet:	.byte	16, 0
	.word	1		/* sectors */
	.word	BUFFER, 0	/* offset, segment */
packet_sector:
	.word	0, 0, 0, 0

	.org	510
	.word	0xaa55

	.set	i, 0
	.rept	256
	.word	0xa500 + i
	.set	i, i + 1
	.endr
