// The least that a test needs: named cases, and checks that go on after a failure.
#pragma once

#include <cstring>
#include <iostream>
#include <vector>

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int failures = 0;

#define CASE(name)                                                                 \
  static void name();                                                              \
  static const bool name##_registered = (cases().push_back({#name, &name}), true); \
  static void name()

// CHECK(a == b, "shown with " << value)
#define CHECK(condition, text)                                                               \
  if (!(condition)) {                                                                        \
    ++failures;                                                                              \
    std::cerr << __FILE__ << ':' << __LINE__ << ": " #condition " failed: " << text << '\n'; \
  }

// Runs the cases named on the command line, or all.
inline int run_cases(int argc, char** argv) {
  int found = 0;
  for (const Case& c : cases()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], c.name) == 0;
    if (!wanted) continue;
    ++found;
    c.run();
  }
  if (found == 0) std::cerr << "no such case\n";
  return failures != 0 || found == 0;
}
