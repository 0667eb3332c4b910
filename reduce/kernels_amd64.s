#include "textflag.h"

// Kernels for AVX2 and F16C. Each does blocks of 32 elements. The accumulator is always the first operand of an addition, which decides which of two NaN wins.
// (Go's assembler writes operands from last to first.) Sources and destinations may be unaligned.

DATA constants<>+0(SB)/8, $0x8000800080008000  // sign of an F16
DATA constants<>+8(SB)/8, $0x8000800080008000
DATA constants<>+16(SB)/8, $0x007f007f007f007f // an E4M3 without its sign; also its NaN
DATA constants<>+24(SB)/8, $0x007f007f007f007f
DATA constants<>+32(SB)/8, $0x7e007e007e007e00 // makes an F16 a quiet NaN
DATA constants<>+40(SB)/8, $0x7e007e007e007e00
DATA constants<>+48(SB)/8, $0x0000000043800000 // 256 as F32
GLOBL constants<>(SB), RODATA|NOPTR, $56

// Decode 8 elements at offset in SI to y. x is the lower half of y.

#define DECODE_F16(offset, x, y) \
	VCVTPH2PS offset(SI), y

#define DECODE_BF16(offset, x, y) \
	VPMOVZXWD offset(SI), y; \
	VPSLLD    $16, y, y

// E5M2 is the upper half of an F16. Y15 is the scale.
#define DECODE_F8E5M2(offset, x, y) \
	VPMOVZXBW offset(SI), x;  \
	VPSLLW    $8, x, x;       \
	VCVTPH2PS x, y;           \
	VMULPS    Y15, y, y

// E4M3: exponent and fraction are put where an F16 has them, which makes the value 256 times too small, exactly. X8 and X9 are used.
// X10: signs, X11: 7F, X12: 7E00, Y13: 256, Y15: scale.
#define DECODE_F8E4M3(offset, x, y) \
	VPMOVZXBW offset(SI), x;  \
	VPSLLW    $8, x, X8;      \
	VPAND     X10, X8, X8;    \
	VPAND     X11, x, x;      \
	VPCMPEQW  X11, x, X9;     \
	VPAND     X12, X9, X9;    \
	VPSLLW    $7, x, x;       \
	VPOR      X8, x, x;       \
	VPOR      X9, x, x;       \
	VCVTPH2PS x, y;           \
	VMULPS    Y13, y, y;      \
	VMULPS    Y15, y, y

#define STORE_BLOCK \
	VMOVUPS Y0, (DI);    \
	VMOVUPS Y1, 32(DI);  \
	VMOVUPS Y2, 64(DI);  \
	VMOVUPS Y3, 96(DI)

#define ADD_BLOCK \
	VMOVUPS (DI), Y4;      \
	VMOVUPS 32(DI), Y5;    \
	VMOVUPS 64(DI), Y6;    \
	VMOVUPS 96(DI), Y7;    \
	VADDPS  Y0, Y4, Y0;    \
	VADDPS  Y1, Y5, Y1;    \
	VADDPS  Y2, Y6, Y2;    \
	VADDPS  Y3, Y7, Y3

#define NEXT_BLOCK(bytes) \
	ADDQ $bytes, SI; \
	ADDQ $128, DI;   \
	DECQ CX;         \
	JNZ  loop

#define ARGUMENTS \
	MOVQ dst+0(FP), DI;     \
	MOVQ src+8(FP), SI;     \
	MOVQ blocks+16(FP), CX; \
	TESTQ CX, CX;           \
	JZ   done

#define SCALE \
	VBROADCASTSS scale+24(FP), Y15

#define E4M3_CONSTANTS \
	VMOVDQU      constants<>+0(SB), X10;  \
	VMOVDQU      constants<>+16(SB), X11; \
	VMOVDQU      constants<>+32(SB), X12; \
	VBROADCASTSS constants<>+48(SB), Y13

// func setF16(dst *float32, src *byte, blocks int)
TEXT ·setF16(SB), NOSPLIT, $0-24
	ARGUMENTS

loop:
	DECODE_F16(0, X0, Y0)
	DECODE_F16(16, X1, Y1)
	DECODE_F16(32, X2, Y2)
	DECODE_F16(48, X3, Y3)
	STORE_BLOCK
	NEXT_BLOCK(64)
	VZEROUPPER

done:
	RET

// func addF16(dst *float32, src *byte, blocks int)
TEXT ·addF16(SB), NOSPLIT, $0-24
	ARGUMENTS

loop:
	DECODE_F16(0, X0, Y0)
	DECODE_F16(16, X1, Y1)
	DECODE_F16(32, X2, Y2)
	DECODE_F16(48, X3, Y3)
	ADD_BLOCK
	STORE_BLOCK
	NEXT_BLOCK(64)
	VZEROUPPER

done:
	RET

// func setBF16(dst *float32, src *byte, blocks int)
TEXT ·setBF16(SB), NOSPLIT, $0-24
	ARGUMENTS

loop:
	DECODE_BF16(0, X0, Y0)
	DECODE_BF16(16, X1, Y1)
	DECODE_BF16(32, X2, Y2)
	DECODE_BF16(48, X3, Y3)
	STORE_BLOCK
	NEXT_BLOCK(64)
	VZEROUPPER

done:
	RET

// func addBF16(dst *float32, src *byte, blocks int)
TEXT ·addBF16(SB), NOSPLIT, $0-24
	ARGUMENTS

loop:
	DECODE_BF16(0, X0, Y0)
	DECODE_BF16(16, X1, Y1)
	DECODE_BF16(32, X2, Y2)
	DECODE_BF16(48, X3, Y3)
	ADD_BLOCK
	STORE_BLOCK
	NEXT_BLOCK(64)
	VZEROUPPER

done:
	RET

// func setF8E5M2(dst *float32, src *byte, blocks int, scale float32)
TEXT ·setF8E5M2(SB), NOSPLIT, $0-28
	ARGUMENTS
	SCALE

loop:
	DECODE_F8E5M2(0, X0, Y0)
	DECODE_F8E5M2(8, X1, Y1)
	DECODE_F8E5M2(16, X2, Y2)
	DECODE_F8E5M2(24, X3, Y3)
	STORE_BLOCK
	NEXT_BLOCK(32)
	VZEROUPPER

done:
	RET

// func addF8E5M2(dst *float32, src *byte, blocks int, scale float32)
TEXT ·addF8E5M2(SB), NOSPLIT, $0-28
	ARGUMENTS
	SCALE

loop:
	DECODE_F8E5M2(0, X0, Y0)
	DECODE_F8E5M2(8, X1, Y1)
	DECODE_F8E5M2(16, X2, Y2)
	DECODE_F8E5M2(24, X3, Y3)
	ADD_BLOCK
	STORE_BLOCK
	NEXT_BLOCK(32)
	VZEROUPPER

done:
	RET

// func setF8E4M3(dst *float32, src *byte, blocks int, scale float32)
TEXT ·setF8E4M3(SB), NOSPLIT, $0-28
	ARGUMENTS
	SCALE
	E4M3_CONSTANTS

loop:
	DECODE_F8E4M3(0, X0, Y0)
	DECODE_F8E4M3(8, X1, Y1)
	DECODE_F8E4M3(16, X2, Y2)
	DECODE_F8E4M3(24, X3, Y3)
	STORE_BLOCK
	NEXT_BLOCK(32)
	VZEROUPPER

done:
	RET

// func addF8E4M3(dst *float32, src *byte, blocks int, scale float32)
TEXT ·addF8E4M3(SB), NOSPLIT, $0-28
	ARGUMENTS
	SCALE
	E4M3_CONSTANTS

loop:
	DECODE_F8E4M3(0, X0, Y0)
	DECODE_F8E4M3(8, X1, Y1)
	DECODE_F8E4M3(16, X2, Y2)
	DECODE_F8E4M3(24, X3, Y3)
	ADD_BLOCK
	STORE_BLOCK
	NEXT_BLOCK(32)
	VZEROUPPER

done:
	RET

// func sumF32(dst *float32, srcs **byte, count, blocks int, keep bool)
//
// R8 is the offset in bytes, R9 the next source, R10 how many are left.
TEXT ·sumF32(SB), NOSPLIT, $0-33
	MOVQ    dst+0(FP), DI
	MOVQ    srcs+8(FP), BX
	MOVQ    count+16(FP), DX
	MOVQ    blocks+24(FP), CX
	MOVBLZX keep+32(FP), AX
	XORQ    R8, R8
	TESTQ   CX, CX
	JZ      done

block:
	MOVQ    BX, R9
	MOVQ    DX, R10
	TESTB   AX, AX
	JZ      first
	VMOVUPS (DI)(R8*1), Y0
	VMOVUPS 32(DI)(R8*1), Y1
	VMOVUPS 64(DI)(R8*1), Y2
	VMOVUPS 96(DI)(R8*1), Y3
	JMP     source

first:
	MOVQ    (R9), SI
	ADDQ    $8, R9
	VMOVUPS (SI)(R8*1), Y0
	VMOVUPS 32(SI)(R8*1), Y1
	VMOVUPS 64(SI)(R8*1), Y2
	VMOVUPS 96(SI)(R8*1), Y3
	DECQ    R10
	JZ      store

source:
	MOVQ   (R9), SI
	ADDQ   $8, R9
	VADDPS (SI)(R8*1), Y0, Y0
	VADDPS 32(SI)(R8*1), Y1, Y1
	VADDPS 64(SI)(R8*1), Y2, Y2
	VADDPS 96(SI)(R8*1), Y3, Y3
	DECQ   R10
	JNZ    source

store:
	VMOVUPS Y0, (DI)(R8*1)
	VMOVUPS Y1, 32(DI)(R8*1)
	VMOVUPS Y2, 64(DI)(R8*1)
	VMOVUPS Y3, 96(DI)(R8*1)
	ADDQ    $128, R8
	DECQ    CX
	JNZ     block
	VZEROUPPER

done:
	RET

// func divideF32(dst *float32, blocks int, by float32)
TEXT ·divideF32(SB), NOSPLIT, $0-20
	MOVQ         dst+0(FP), DI
	MOVQ         blocks+8(FP), CX
	VBROADCASTSS by+16(FP), Y15
	TESTQ        CX, CX
	JZ           done

loop:
	VMOVUPS (DI), Y0
	VMOVUPS 32(DI), Y1
	VMOVUPS 64(DI), Y2
	VMOVUPS 96(DI), Y3
	VDIVPS  Y15, Y0, Y0
	VDIVPS  Y15, Y1, Y1
	VDIVPS  Y15, Y2, Y2
	VDIVPS  Y15, Y3, Y3
	STORE_BLOCK
	ADDQ    $128, DI
	DECQ    CX
	JNZ     loop

done:
	VZEROUPPER
	RET
