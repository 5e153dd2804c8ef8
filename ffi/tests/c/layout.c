/* Sizes and offsets of every struct as this compiler sees them; layout.def holds what the library sees. Also compiled as
 * C++. */
#include "kvtransfer.h"

#ifdef __cplusplus
#define KVT_ASSERT static_assert
#define KVT_ALIGNOF alignof
#else
#define KVT_ASSERT _Static_assert
#define KVT_ALIGNOF _Alignof
#endif

#define KVT_STRUCT(type, size, align)                        \
  KVT_ASSERT(sizeof(type) == (size), "size of " #type);      \
  KVT_ASSERT(KVT_ALIGNOF(type) == (align), "alignment of " #type);
#define KVT_FIELD(type, field, offset, size)                                    \
  KVT_ASSERT(offsetof(type, field) == (offset), "offset of " #type "." #field); \
  KVT_ASSERT(sizeof(((type *)0)->field) == (size), "size of " #type "." #field);

#include "layout.def"

int main(void) { return 0; }
