// What an object was built from: GAM_BUILT_FROM, as gam_fused/backends/stamp.py makes it. Each object's bindings
// include this once.
#pragma once

#define GAM_TEXT_OF(...) #__VA_ARGS__
#define GAM_TEXT(...) GAM_TEXT_OF(__VA_ARGS__)

extern "C" __attribute__((visibility("default"))) const char* gam_fused_built_from() {
  return GAM_TEXT(GAM_BUILT_FROM);
}
