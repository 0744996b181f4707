// The kernels for whatever the compiler targets by itself.
#define GAM_KERNELS baseline_kernels
#include "kernels.h"
