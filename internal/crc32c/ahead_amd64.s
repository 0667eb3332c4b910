#include "textflag.h"

// func prefetch(first *byte, lines int)
TEXT ·prefetch(SB), NOSPLIT, $0-16
	MOVQ  first+0(FP), SI
	MOVQ  lines+8(FP), CX
	TESTQ CX, CX
	JZ    done

loop:
	PREFETCHT0 (SI)
	ADDQ       $64, SI
	DECQ       CX
	JNZ        loop

done:
	RET
